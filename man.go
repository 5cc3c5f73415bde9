package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/urfave/cli/v3"

	"github.com/hyperhq/runv/config"
	"github.com/hyperhq/runv/version"
)

// manCommand writes the manual from the same tree that --help is made of, so
// that the two cannot differ. It is for the Makefile.
func (a *app) manCommand() *cli.Command {
	return &cli.Command{
		Name:      "man",
		Hidden:    true,
		Usage:     "write the manual pages into a directory",
		ArgsUsage: "<directory>",
		Action: func(_ context.Context, cmd *cli.Command) error {
			if err := arguments(cmd, 1, 1); err != nil {
				return err
			}
			dir := cmd.Args().First()
			// A tree that no command line was parsed with.
			root := (&app{config: config.Default(), log: newLogger()}).command()
			for name, page := range manPages(root) {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(page), 0o644); err != nil {
					return fmt.Errorf("write manual: %w", err)
				}
			}
			return nil
		},
	}
}

// manPages are the pages by file name: runv.8 and one per command.
func manPages(root *cli.Command) map[string]string {
	pages := map[string]string{}
	var walk func(c *cli.Command, names []string)
	walk = func(c *cli.Command, names []string) {
		names = append(names[:len(names):len(names)], c.Name)
		pages[strings.Join(names, "-")+".8"] = manPage(c, names)
		for _, sub := range visible(c) {
			walk(sub, names)
		}
	}
	walk(root, nil)
	return pages
}

func visible(c *cli.Command) []*cli.Command {
	var list []*cli.Command
	for _, sub := range c.Commands {
		if !sub.Hidden {
			list = append(list, sub)
		}
	}
	return list
}

func manPage(c *cli.Command, names []string) string {
	var b strings.Builder
	title := strings.Join(names, "-")
	fmt.Fprintf(&b, ".TH %s 8 \"\" \"runv %s\" \"runv manual\"\n", troff(strings.ToUpper(title)), troff(version.Version))
	fmt.Fprintf(&b, ".SH NAME\n%s \\- %s\n", troff(title), troff(c.Usage))
	b.WriteString(".SH SYNOPSIS\n.B " + troff(strings.Join(names, " ")) + "\n")
	switch {
	case len(names) == 1:
		b.WriteString("[global options] command [command options] [arguments...]\n")
	case len(c.Commands) > 0:
		b.WriteString("command [command options] [arguments...]\n")
	default:
		if len(c.Flags) > 0 {
			b.WriteString("[command options] ")
		}
		b.WriteString(troff(c.ArgsUsage) + "\n")
	}
	if c.Description != "" {
		b.WriteString(".SH DESCRIPTION\n" + manText(c.Description))
	}
	if subs := visible(c); len(subs) > 0 {
		b.WriteString(".SH COMMANDS\n")
		for _, sub := range subs {
			fmt.Fprintf(&b, ".TP\n.BR %s (8)\n%s\n", troff(title+"-"+sub.Name), troff(sub.Usage))
		}
	}
	if len(c.Flags) > 0 {
		heading := "OPTIONS"
		if len(names) == 1 {
			heading = "GLOBAL OPTIONS"
		}
		b.WriteString(".SH " + heading + "\n")
		for _, f := range c.Flags {
			manFlag(&b, f)
		}
	}
	if len(names) == 1 {
		fmt.Fprintf(&b, ".SH FILES\n.TP\n.I %s\nsettings; every key is also a global option\n.TP\n.I %s\nstate of containers\n.TP\n.I %s\nthe guest's kernel\n.TP\n.I %s\nthe guest's initrd\n",
			troff(config.DefaultPath), troff(config.Default().Root), troff(config.Default().Kernel), troff(config.Default().Initrd))
	}
	b.WriteString(".SH SEE ALSO\n")
	if len(names) == 1 {
		b.WriteString(".BR runc (8)\n")
	} else {
		fmt.Fprintf(&b, ".BR %s (8)\n", troff(strings.Join(names[:len(names)-1], "-")))
	}
	return b.String()
}

func manFlag(b *strings.Builder, f cli.Flag) {
	if v, ok := f.(cli.VisibleFlag); ok && !v.IsVisible() {
		return
	}
	var names []string
	for _, n := range f.Names() {
		dash := "--"
		if len(n) == 1 {
			dash = "-"
		}
		names = append(names, dash+n)
	}
	fmt.Fprintf(b, ".TP\n.B %s\n", troff(strings.Join(names, ", ")))
	d, ok := f.(cli.DocGenerationFlag)
	if !ok {
		return
	}
	b.WriteString(troff(d.GetUsage()))
	if v := d.GetDefaultText(); v != "" {
		fmt.Fprintf(b, " (default: %s)", troff(v))
	} else if v := d.GetValue(); d.TakesValue() && d.IsDefaultVisible() && v != "" && v != "0" {
		fmt.Fprintf(b, " (default: %s)", troff(v))
	}
	b.WriteString("\n")
}

// manText is a description: paragraphs are filled, indented lines kept.
func manText(text string) string {
	var b strings.Builder
	literal := false
	for _, line := range strings.Split(text, "\n") {
		indented := strings.HasPrefix(line, " ")
		if indented != literal && line != "" {
			if indented {
				b.WriteString(".nf\n")
			} else {
				b.WriteString(".fi\n")
			}
			literal = indented
		}
		if line == "" {
			b.WriteString(".PP\n")
			continue
		}
		b.WriteString(troff(line) + "\n")
	}
	if literal {
		b.WriteString(".fi\n")
	}
	return b.String()
}

// troff keeps text from being taken for requests and escapes.
func troff(s string) string {
	s = strings.ReplaceAll(s, "\\", "\\e")
	s = strings.ReplaceAll(s, "-", "\\-")
	if strings.HasPrefix(s, ".") || strings.HasPrefix(s, "'") {
		s = "\\&" + s
	}
	return s
}
