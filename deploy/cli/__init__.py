"""The command line, `shoal`. Modules here import what is heavy (torch, ray, grpc) only when a command runs."""
