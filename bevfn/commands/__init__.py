"""The functions behind the subcommands of `bevfn`: plain functions of typed arguments, wired up by `bevfn.cli`."""
