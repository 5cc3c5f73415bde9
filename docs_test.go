package main

import (
	"os"
	"strings"
	"testing"

	"github.com/urfave/cli/v3"

	"github.com/hyperhq/runv/config"
)

// The pages name every command, flag and setting.
func TestDocumentsAreComplete(t *testing.T) {
	read := func(name string) string {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	page := read("docs/configuration.md")
	for _, k := range config.Keys() {
		if !strings.Contains(page, "`"+k.Name+"`") {
			t.Errorf("docs/configuration.md lacks key %q", k.Name)
		}
	}
	page = read("docs/command-line.md")
	root := testApp(t).command()
	for _, c := range visible(root) {
		if !strings.Contains(page, "`"+c.Name) {
			t.Errorf("docs/command-line.md lacks command %q", c.Name)
		}
		if c.Name != "create" && c.Name != "run" && c.Name != "exec" {
			continue
		}
		for _, f := range c.Flags {
			if !strings.Contains(page, "--"+f.Names()[0]) {
				t.Errorf("docs/command-line.md lacks flag --%s of %s", f.Names()[0], c.Name)
			}
		}
	}
	for _, f := range root.Flags {
		if name := f.Names()[0]; !strings.Contains(page, "--"+name) && !strings.Contains(read("docs/configuration.md"), "`"+name+"`") {
			t.Errorf("no page has global flag --%s", name)
		}
	}
}

func TestManPages(t *testing.T) {
	pages := manPages(testApp(t).command())
	for _, want := range []string{"runv.8", "runv-run.8", "runv-exec.8", "runv-manage-build-guest.8", "runv-check.8"} {
		p := pages[want]
		for _, section := range []string{".TH ", ".SH NAME", ".SH SYNOPSIS", ".SH SEE ALSO"} {
			if !strings.Contains(p, section) {
				t.Errorf("%s lacks %q", want, section)
			}
		}
	}
	if _, ok := pages["runv-man.8"]; ok {
		t.Error("a hidden command has a page")
	}
	if !strings.Contains(pages["runv-run.8"], `\-\-console\-socket`) || strings.Contains(pages["runv.8"], `criu`) {
		t.Error("flags are not as they should be")
	}
}

func TestEveryCommandHasHelp(t *testing.T) {
	forEach(testApp(t).command(), func(c *cli.Command) {
		if c.Usage == "" || len(c.Commands) == 0 && c.Action == nil {
			t.Errorf("command %q has usage %q", c.Name, c.Usage)
		}
	})
}
