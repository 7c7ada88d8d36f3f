"""All orders of the modalities side by side: plans, runs, statistics and reports."""
