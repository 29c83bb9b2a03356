"""Training jobs through `attach`, injection and `rehearsal_plugin.run`, whatever the framework."""
