"""Networks only: no loss, no configuration, no logging. This package imports no other package of ldmscale."""
