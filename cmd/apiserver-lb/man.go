package main

import (
	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// newMan makes the manual pages of what the commands say of themselves, so that these are
// never behind. It is for who makes packages. SOURCE_DATE_EPOCH in the environment
// becomes their date.
func newMan() *cobra.Command {
	return &cobra.Command{
		Use:    "man DIRECTORY",
		Short:  "Write the manual pages to a directory",
		Args:   cobra.ExactArgs(1),
		Hidden: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			root := cmd.Root()
			root.DisableAutoGenTag = true // it has the time of day
			return doc.GenManTree(root, &doc.GenManHeader{
				Title: "APISERVER-LB", Section: "8", Source: "apiserver-lb " + version, Manual: "System Administration",
			}, args[0])
		},
	}
}
