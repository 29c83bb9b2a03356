"""Jobs under `horovodrun`: the optimizer, elastic jobs and unchanged scripts."""
