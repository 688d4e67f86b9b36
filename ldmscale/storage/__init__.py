"""Files, leases and object stores: the only package that renames files, locks and talks to stores."""
