"""Files and objects, wherever they lie: ranges, atomic writes, retries."""
