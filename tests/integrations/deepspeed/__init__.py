"""Jobs on engines of DeepSpeed: ZeRO, pipelines, tensor and sequence parallelism."""
