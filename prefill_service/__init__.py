"""The prefill service: prompts in chunks, and their KV blocks on the way to decode."""

from tandem.service.polling import read_where_python_waits

read_where_python_waits()
