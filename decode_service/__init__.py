"""The decode service: continuous batching over KV that was computed here or received."""

from tandem.service.polling import read_where_python_waits

read_where_python_waits()
