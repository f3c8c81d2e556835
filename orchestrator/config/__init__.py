"""What to compute and where: options and YAML files, validated."""
