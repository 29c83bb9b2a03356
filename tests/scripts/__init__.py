"""The scripts: benchmarks, studies, recipes and the pages they build, in sizes that take seconds."""
