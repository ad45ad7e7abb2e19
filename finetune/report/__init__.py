"""`report`: one page about tuning runs, from what they left on disk and from texts that their bundles write."""
