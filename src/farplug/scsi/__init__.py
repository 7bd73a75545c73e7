"""SCSI: commands, sense, and what a disk answers. Pure: it decides, transports and stores do."""
