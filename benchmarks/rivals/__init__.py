"""What a user would pick instead, each at its best. What must not live here: measuring, or what slows a rival."""
