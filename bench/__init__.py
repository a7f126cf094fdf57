"""Measurements, each a module with a command line."""

from tandem.service.polling import read_where_python_waits

read_where_python_waits()
