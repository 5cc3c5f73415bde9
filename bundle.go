package main

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/urfave/cli/v3"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/bundle"
)

// bundleDir is the --bundle flag as an absolute path.
func bundleDir(cmd *cli.Command) (string, error) {
	dir, err := filepath.Abs(cmd.String("bundle"))
	if err != nil {
		return "", fmt.Errorf("bundle: %w", err)
	}
	return dir, nil
}

// request reads the bundle that the flags name and says what a container made
// of it needs: the request and the network namespace.
func (a *app) request(cmd *cli.Command, id string) (*specs.Spec, *supervisorv1.CreateRequest, string, error) {
	dir, err := bundleDir(cmd)
	if err != nil {
		return nil, nil, "", err
	}
	return bundle.Request(bundle.Options{
		ID:            id,
		Dir:           dir,
		Config:        &a.config,
		SystemdCgroup: cmd.Bool("systemd-cgroup"),
		NoPivot:       cmd.Bool("no-pivot"),
		Pod:           cmd.String("pod"),
		Pods:          a.client,
		Warn:          a.log.warning,
	})
}

// vm is what the configuration says of virtual machines.
func (a *app) vm() (*supervisorv1.VM, error) { return bundle.VM(&a.config) }

// preserveFDs refuses what a virtual machine cannot have.
func preserveFDs(cmd *cli.Command) error {
	if n := cmd.Int("preserve-fds"); n > 0 {
		return fmt.Errorf("--preserve-fds=%d: an open file of this host cannot be passed into a virtual machine", n)
	}
	return nil
}

// checkConsole is runc's rule for --console-socket.
func checkConsole(terminal, detach bool, socket string) error {
	if terminal && detach && socket == "" {
		return errors.New("cannot allocate tty if runv will detach without setting console socket")
	}
	if (!terminal || !detach) && socket != "" {
		return errors.New("cannot use console socket if runv will not detach or allocate tty")
	}
	return nil
}
