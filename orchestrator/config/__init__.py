"""Configuration, validated: what to compute and where, by options and YAML files."""
