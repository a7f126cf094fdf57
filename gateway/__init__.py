"""The gateway: clients on one side, prefill and decode workers on the other."""

from tandem.service.polling import read_where_python_waits

read_where_python_waits()
