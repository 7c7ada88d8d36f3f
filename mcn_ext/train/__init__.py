"""Run folders, checkpoints, logs and guards: what a training run needs beside its loop."""
