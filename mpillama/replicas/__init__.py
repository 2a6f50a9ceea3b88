"""Several engines in one job: requests to the least loaded one, and to another one if it fails."""
