"""Training that specialises experts by modality, as SMoES and SMAR describe it. Needs the extra `[trace]`."""
