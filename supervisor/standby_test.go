package supervisor

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/factory"
)

// standby makes one of the pod's fakes.
func (p *pod) standby() *Standby {
	p.t.Helper()
	dir := p.t.TempDir()
	b, err := StartStandby(p.t.Context(), StandbyOptions{
		Name: "standby-1", Dir: dir, Version: "test",
		VM: &supervisorv1.VM{Kernel: p.kernel, Initrd: p.initrd, Vcpus: 1, MemoryMib: 128, Network: "none"},
		Factory: func(context.Context, *supervisorv1.VM) (factory.Factory, string, error) {
			return factory.Direct(p.driver), "fake", nil
		},
		newShare: func(dir string, _ *os.File) (sharer, error) {
			return stage{t: p.t}, os.MkdirAll(filepath.Join(dir, shareName), 0o700)
		},
	})
	if err != nil {
		p.t.Fatal(err)
	}
	return b
}

// stage is a share on which a rehearsal can be held.
type stage struct {
	noShare
	t *testing.T
}

func (s stage) rehearsal(program []byte) (string, func(), error) {
	if !bytes.HasPrefix(program, []byte("\x7fELF")) {
		s.t.Errorf("the program begins with %q", program[:4])
	}
	return "somewhere/rootfs", func() {}, nil
}

func (stage) move(dir string, _ *os.File) error {
	return os.MkdirAll(filepath.Join(dir, shareName), 0o700)
}

// A standby has done what a pod needs before it stops its processors, and left
// nothing of it.
func TestStandbyRehearses(t *testing.T) {
	p := newPod(t, func(p *pod) { p.s.o.Standby = p.standby() })
	count := make(map[string]int)
	for _, name := range p.agent.Calls() {
		count[name]++
	}
	for _, name := range []string{"CreateContainer", "StartContainer", "Exec", "SignalProcess", "DeleteContainer"} {
		if count[name] != rehearsals {
			t.Errorf("%d times %s, want %d", count[name], name, rehearsals)
		}
	}
	_ = p.life.Close()
	<-p.served
	<-p.vm().Done()
}

// A standby that is getting ready stands still when it is told to.
func TestStandbyYields(t *testing.T) {
	p := newPod(t, func(p *pod) {
		b := p.standby()
		defer b.Close()
		yields := make(chan bool)
		stop := b.machine.yield(t.Context(), yields)
		for _, still := range []bool{false, true, false} {
			yields <- still
			for p.vm().Paused() != still && t.Context().Err() == nil {
				runtime.Gosched()
			}
		}
		stop()
		select {
		case yields <- true:
			t.Error("it still listens")
		default:
		}
	})
	_ = p.life.Close()
	<-p.served
}

// A standby that nobody has used goes with its pod.
func TestStandbyWithoutCreate(t *testing.T) {
	adopted := make(chan struct{})
	p := newPod(t, func(p *pod) {
		p.s.o.Standby = p.standby()
		p.s.o.Adopted = func() { close(adopted) }
	})
	<-adopted
	// Its guest is greeted anew beside the first call.
	for len(p.agent.Hellos()) < 2 && t.Context().Err() == nil {
		runtime.Gosched()
	}
	if _, err := os.Stat(filepath.Join(p.dir, consoleName)); err != nil && !os.IsNotExist(err) {
		t.Error(err)
	}
	_ = p.life.Close()
	<-p.served
	<-p.vm().Done()
	if n := len(p.driver.VMs()); n != 1 {
		t.Errorf("%d VMs were started", n)
	}
	// Once for its own start, once with fresh entropy for the pod.
	hs := p.agent.Hellos()
	if len(hs) < 2 || string(hs[0].Entropy) == string(hs[len(hs)-1].Entropy) {
		t.Errorf("%d hellos", len(hs))
	}
}

// The VM that was ready has died, and nobody had noticed: the pod has one all
// the same.
func TestStandbyDead(t *testing.T) {
	p := newPod(t, func(p *pod) {
		p.s.o.Standby = p.standby()
		p.crash()
	})
	p.create("pod", nil, "sleep")
	vms := p.driver.VMs()
	if len(vms) != 2 {
		t.Fatalf("%d VMs were started, want another one", len(vms))
	}
	if r := p.record("pod"); r.VM.Pid != vms[1].Pid() {
		t.Errorf("the record names process %d, want %d", r.VM.Pid, vms[1].Pid())
	}
	p.cancel()
	<-p.served
}
