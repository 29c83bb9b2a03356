"""The page of trainers that people start, built from the results of `scripts/test_clients.sh`."""
