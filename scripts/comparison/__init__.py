"""ringblk against its peers: what scripts/compare runs, and what it makes of it."""
