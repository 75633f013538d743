"""What every storey uses: extras that may be missing, the logger, the version."""
