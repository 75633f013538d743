"""Files on disk: atomic writes, validation of untrusted input, checksums and fingerprints."""
