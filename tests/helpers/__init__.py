"""Code that several tests share: samples, jobs, processes and launchers; it holds no tests."""
