"""What ``python -m bitsandbytes`` finds: the path of that package is this folder."""
