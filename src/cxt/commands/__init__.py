"""Commands besides the stages: `cxt NAME` runs `cxt.commands.NAME`."""
