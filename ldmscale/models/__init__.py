"""Networks only: no loss, no configuration, no logging. This room imports no other room of ldmscale."""
