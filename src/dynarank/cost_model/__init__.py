"""What a layer costs dense, through its factors, or multiplied out: by a rule, or as measured on this machine."""
