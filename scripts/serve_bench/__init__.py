"""The load test of the server: clients, servers as subprocesses, and profiles of load."""
