"""What `ldmscale doctor` finds out: about ranks and disks before a run, and about a run after a crash."""
