"""One thin file a job: compose, check, build, run, close. `main(overrides)` returns the exit status."""
