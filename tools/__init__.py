"""The command line, the report and what they measure with."""

if __name__ != "torchlathe.tools":
    raise ImportError("import torchlathe.tools, not tools")
