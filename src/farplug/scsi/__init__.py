"""SCSI commands, sense data, disks and CD-ROM drives, sans-IO: units return actions, which transports carry out."""
