"""Jobs on several hosts, which are network namespaces of this machine; `scripts/test_hosts.sh` runs them."""
