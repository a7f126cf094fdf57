"""What `tandem up` runs: the processes of one machine, started, watched, scaled and stopped together."""
