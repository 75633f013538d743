"""Raw data in, raw data out."""
