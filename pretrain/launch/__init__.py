"""Starting on several hosts: what launchers of other projects are given, checked before they are started."""
