"""Communication between ranks, how a run starts under a launcher, and how it ends when something fails."""
