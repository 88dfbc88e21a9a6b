"""Commands beside the stages: `cxt NAME` runs `cxt.commands.NAME`."""
