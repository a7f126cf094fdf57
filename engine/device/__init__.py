"""Steps on a GPU: staging, captured graphs, memory. A CPU's engine runs none of it."""
