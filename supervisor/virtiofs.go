package supervisor

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/golang/glog"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/hypervisor"
	"github.com/hyperhq/runv/virtiofs"
)

// How a guest reaches the pod's share, as VM.share has it.
const (
	shareAuto     = "auto"
	share9P       = "9p"
	shareVirtiofs = "virtiofs"
)

// driverKVM is the driver with which "auto" means virtiofs; see docs/shares.md.
const driverKVM = "kvm"

// fileServer is a virtiofs server; tests have another than virtiofs.Server.
type fileServer interface {
	Pid() int
	Done() <-chan struct{}
	Exit() (text string, orderly bool)
	Release()
	Close()
}

// uncloned is the VM to start for vm: if virtiofs is asked for by name, one that
// boots, with the reason why it is not cloned if that was asked for, too.
func uncloned(name string, vm *supervisorv1.VM) (_ *supervisorv1.VM, warning string, err error) {
	switch vm.Share {
	case "", shareAuto, share9P:
		return vm, "", nil
	case shareVirtiofs:
	default:
		return nil, "", invalid("vm.share is %q, want %q, %q or %q", vm.Share, shareAuto, share9P, shareVirtiofs)
	}
	if vm.Template == "" && vm.Factory == "" {
		return vm, "", nil
	}
	const why = "its share is virtiofs, whose server maps the guest's memory, so it cannot be a template's"
	if vm.TemplatePolicy == "required" {
		return nil, "", status.Errorf(codes.FailedPrecondition, "vm %s cannot be cloned, and template-policy is \"required\": %s", name, why)
	}
	vm, ok := proto.Clone(vm).(*supervisorv1.VM)
	if !ok {
		return nil, "", errors.New("the request's VM cannot be copied")
	}
	vm.Template, vm.Factory, vm.TemplatePolicy = "", "", ""
	warning = fmt.Sprintf("vm %s boots: %s", name, why)
	glog.Warning(warning)
	return vm, warning, nil
}

// startFileServer starts the server of cfg's share if it is to be virtiofs, and
// gives cfg the connection to it; nil: QEMU serves the share with 9p.
func startFileServer(ctx context.Context, vm *supervisorv1.VM, driver string, cfg *hypervisor.Config) (fileServer, error) {
	auto := vm.Share != shareVirtiofs
	if vm.Share == share9P || auto && (driver != driverKVM || vm.Template != "" || vm.Factory != "") {
		return nil, nil
	}
	p, err := virtiofs.Find(ctx, vm.Virtiofsd)
	switch {
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case err != nil && auto:
		glog.V(1).Infof("vm %s: its share is 9p: %v", cfg.Name, err)
		return nil, nil
	case err != nil:
		return nil, status.Errorf(codes.FailedPrecondition, "share is %q: %v", shareVirtiofs, err)
	}
	// What is shared so is read anew each time: there is no second device.
	cfg.Shares = cfg.Shares[:1:1]
	share := &cfg.Shares[0]
	s, err := p.Start(share.Path, filepath.Dir(share.Path))
	if err != nil {
		return nil, fmt.Errorf("serve the pod's share: %w", err)
	}
	share.Server = s.Conn()
	glog.V(1).Infof("vm %s: its share is virtiofs, served by %s %s (pid %d)", cfg.Name, p.Path, p.Version, s.Pid())
	return s, nil
}

// shareKind is how the guest reaches the pod's share.
func (m *machine) shareKind() string {
	if m.files != nil {
		return shareVirtiofs
	}
	return share9P
}

// guestShares is what the guest mounts of the host.
func (m *machine) guestShares() []*agentv1.Share {
	if m.files != nil {
		return []*agentv1.Share{{Tag: agentv1.ShareTag, Type: shareVirtiofs}}
	}
	return []*agentv1.Share{{Tag: agentv1.ShareTag, Type: share9P, Options: shareOptions}}
}

// guard ends the VM when the server of its share has ended: the guest would wait
// for its files for ever.
func (m *machine) guard() {
	if m.files == nil {
		return
	}
	m.files.Release()
	m.guarding.Go(func() { // ends with the VM at the latest
		select {
		case <-m.vm.Done():
			return
		case <-m.files.Done():
		}
		text, orderly := m.files.Exit()
		if orderly {
			// It ends by itself when the hypervisor has gone, whose side of the
			// connection is closed a little before it can be reaped.
			t := time.NewTimer(endGrace)
			defer t.Stop()
			select {
			case <-m.vm.Done():
				return
			case <-t.C:
			}
		}
		m.mu.Lock()
		m.filesEnd = "the file server of the pod's share (virtiofsd) " + text
		m.mu.Unlock()
		m.vm.Kill()
	})
}

// filesEnded says how the server of the share has ended, if that is what the VM
// has ended of.
func (m *machine) filesEnded() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.filesEnd
}

// closeFiles ends the server of the share. The VM has ended, or never began.
func (m *machine) closeFiles() {
	if m.files != nil {
		m.files.Close()
	}
	m.guarding.Wait()
}
