// Command runv is an OCI runtime that runs each pod in a virtual machine of its
// own. Its command line is runc's; every command lives in a file of its name.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/urfave/cli/v3"
	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/client"
	"github.com/hyperhq/runv/config"
	"github.com/hyperhq/runv/standin"
	"github.com/hyperhq/runv/state"
	"github.com/hyperhq/runv/trace"
	"github.com/hyperhq/runv/version"
)

func main() {
	begun := trace.Now()
	// The roles that are started often or live long need nothing of what
	// follows.
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case standin.Command:
			standin.Main(os.Args[2:])
		case client.SuperviseCommand:
			superviseMain(os.Args[2:], begun)
		case holdCommand:
			holdTemplateMain(os.Args[2:])
		}
	}
	// Descriptors that a caller left open are not for the processes started here.
	_ = unix.CloseRange(3, ^uint(0)>>1, unix.CLOSE_RANGE_CLOEXEC)
	os.Exit(runMain(os.Args, begun))
}

// app is one run of the command line.
type app struct {
	config config.Config
	client *client.Client
	log    *logger
	begun  trace.Mark
	trace  *tracing
	// configFlags are the flags made from the settings, in their order.
	configFlags []cli.Flag
}

// exitError is an error that asks for an exit code other than 1. An empty
// message prints nothing.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return ""
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// exitWith is nil for code 0.
func exitWith(code int) error {
	if code == 0 {
		return nil
	}
	return &exitError{code: code}
}

// runMain runs one command and returns the exit code.
func runMain(args []string, begun trace.Mark) int {
	a := &app{config: config.Default(), log: newLogger(), begun: begun}
	defer a.log.close()
	err := a.command().Run(context.Background(), args)
	if terr := a.trace.close(); terr != nil && err == nil {
		err = terr
	}
	if err == nil {
		return 0
	}
	code := 1
	var exit *exitError
	if errors.As(err, &exit) {
		code = exit.code
	}
	if line := oneLine(err.Error()); line != "" {
		a.log.fatal(line)
	}
	return code
}

// oneLine joins the lines of joined errors.
func oneLine(s string) string {
	return strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
}

const about = `runv is an OCI runtime: a program that runs containers as the Open Container
Initiative describes them. It takes runc's place on a command line and runs each
container's processes in a virtual machine of their own.

Containers are configured using bundles. A bundle for a container is a directory
that includes a specification file named "config.json" and a root filesystem.

To start a new instance of a container:

    # runv run [ -b bundle ] <container-id>

Where "<container-id>" is your name for the instance of the container that you
are starting. The name must be unique on your host. Providing the bundle
directory using "-b" is optional; the default is the current directory.

'runv check' says whether this machine can run containers, and
'runv manage build-guest' makes the guest's kernel and initrd.`

// versionText is what --version prints, in runc's form.
func versionText() string {
	v, commit, _ := strings.Cut(version.String(), " (")
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n", v)
	if commit = strings.TrimSuffix(commit, ")"); commit != "" {
		fmt.Fprintf(&b, "commit: %s\n", commit)
	}
	fmt.Fprintf(&b, "spec: %s\ngo: %s", specs.Version, runtime.Version())
	return b.String()
}

// command is the tree of commands.
func (a *app) command() *cli.Command {
	a.configFlags = configFlags()
	root := &cli.Command{
		Name:        "runv",
		Usage:       "Open Container Initiative runtime with virtual machines",
		Description: about,
		Version:     versionText(),
		Flags: append([]cli.Flag{
			&cli.StringFlag{Name: "config", Usage: "configuration file", DefaultText: config.DefaultPath, TakesFile: true},
			&cli.BoolFlag{Name: "systemd-cgroup", Usage: "expect cgroupsPath to be of form \"slice:prefix:name\" for e.g. \"system.slice:runc:434234\""},
			&cli.StringFlag{Name: "rootless", Value: "auto", Usage: "whether the caller is not root ('true', 'false', or 'auto')"},
			&cli.StringFlag{Name: "trace", TakesFile: true, Usage: "write what the time was spent with to this file, as a Chrome trace"},
			&cli.StringFlag{Name: "criu", Hidden: true, Usage: "accepted and ignored: a virtual machine is not checkpointed by criu"},
		}, a.configFlags...),
		Commands: append([]*cli.Command{
			a.createCommand(), a.deleteCommand(), a.execCommand(), a.killCommand(), a.listCommand(),
			a.pauseCommand(), a.psCommand(), a.resumeCommand(), a.runCommand(), a.specCommand(),
			a.startCommand(), a.stateCommand(), a.featuresCommand(), a.checkCommand(), a.manageCommand(),
			a.updateCommand(), a.interfaceCommand(), a.eventsCommand(), a.inspectCommand(), a.logsCommand(),
			a.manCommand(),
		}, a.checkpointCommands()...),
		EnableShellCompletion:  true,
		HideHelpCommand:        true,
		UseShortOptionHandling: true,
		Before:                 a.before,
		// Errors are printed in one place, runMain.
		ExitErrHandler: func(context.Context, *cli.Command, error) {},
		Action: func(_ context.Context, cmd *cli.Command) error {
			if name := cmd.Args().First(); name != "" {
				return &exitError{code: 3, err: fmt.Errorf("no command is named %q; 'runv --help' lists them", name)}
			}
			return cli.ShowRootCommandHelp(cmd)
		},
	}
	completers := a.completers()
	forEach(root, func(c *cli.Command) {
		if f := completers[c.Name]; f != nil {
			c.ShellComplete = f
		}
		// A comma belongs to the value.
		c.DisableSliceFlagSeparator = true
		// A usage error is an error like any other: one line.
		c.OnUsageError = func(_ context.Context, cmd *cli.Command, err error, _ bool) error {
			return fmt.Errorf("%s: %w", cmd.FullName(), err)
		}
	})
	return root
}

func forEach(c *cli.Command, f func(*cli.Command)) {
	f(c)
	for _, sub := range c.Commands {
		forEach(sub, f)
	}
}

// configFlags makes a global flag of every setting.
func configFlags() []cli.Flag {
	var flags []cli.Flag
	for _, k := range config.Keys() {
		if k.Bool {
			flags = append(flags, &cli.BoolFlag{Name: k.Name, Usage: k.Usage, Value: k.Default == "true", HideDefault: k.Default != "true"})
			continue
		}
		flags = append(flags, &cli.StringFlag{Name: k.Name, Usage: k.Usage, Value: k.Default})
	}
	return flags
}

// before reads the configuration, applies the flags and opens the log.
func (a *app) before(ctx context.Context, cmd *cli.Command) (context.Context, error) {
	// A message about the configuration itself goes where the flags say.
	c, err := config.Load(cmd.String("config"))
	for _, f := range a.configFlags {
		if !f.IsSet() {
			continue
		}
		if serr := c.Set(f.Names()[0], fmt.Sprint(f.Get())); serr != nil && err == nil {
			err = serr
		}
	}
	if err == nil {
		err = c.Validate()
	}
	if lerr := a.log.open(c.Log, c.LogFormat, c.Debug); lerr != nil {
		return ctx, lerr
	}
	if err != nil {
		return ctx, err
	}
	if ctx, a.trace, err = openTrace(ctx, cmd.String("trace"), cmd.Args().First(), a.begun); err != nil {
		return ctx, err
	}
	switch r := cmd.String("rootless"); r {
	case "true", "false", "auto":
	default:
		return ctx, fmt.Errorf("--rootless is %q, want 'true', 'false' or 'auto'", r)
	}
	if c.Root, err = filepath.Abs(c.Root); err != nil {
		return ctx, fmt.Errorf("--root: %w", err)
	}
	a.config = c
	factoryDir, err := a.factoryDir()
	if err != nil {
		return ctx, err
	}
	a.client = client.New(client.Options{
		Store:      state.Open(c.Root),
		FactoryDir: factoryDir,
		Version:    version.String(),
		Debug:      c.Debug,
		Warn:       func(err error) { a.log.warning(oneLine(err.Error())) },
		Debugf:     a.log.debugf,
	})
	return ctx, nil
}

// arguments checks how many there are; max < 0 is no limit.
func arguments(cmd *cli.Command, least, most int) error {
	n := cmd.Args().Len()
	switch {
	case least == most && n != least:
		return fmt.Errorf("runv: %q requires exactly %d argument(s)", cmd.Name, least)
	case n < least:
		return fmt.Errorf("runv: %q requires a minimum of %d argument(s)", cmd.Name, least)
	case most >= 0 && n > most:
		return fmt.Errorf("runv: %q requires a maximum of %d argument(s)", cmd.Name, most)
	}
	return nil
}

// firstArgument stops the parsing of flags behind the container's id: what
// follows belongs to the program that is run.
func firstArgument() *int {
	n := 1
	return &n
}
