"""One model over several processes of a machine, each with a part of every weight and of the KV heads."""
