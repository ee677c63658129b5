"""The commands, one file each. Configs end here: what they call takes values."""

from ssl_emp.run.threads import spin_briefly

spin_briefly()  # here, since every command imports this package before torch
