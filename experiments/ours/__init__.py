"""Tables and figures beyond the paper."""
