"""What measurements leave, without torch: network profiles and how scenarios take them on, folders of measured runs."""
