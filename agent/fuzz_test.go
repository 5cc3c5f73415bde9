package agent

import (
	"bytes"
	"context"
	"io"
	"log"
	"net/netip"
	"testing"

	"google.golang.org/protobuf/proto"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

func FuzzReadHeader(f *testing.F) {
	f.Add(frame(f, &agentv1.StreamHeader{Kind: stdin, ContainerId: "c", ExecId: "e"}))
	f.Add(frame(f, &agentv1.StreamHeader{Kind: agentv1.StreamHeader_KIND_CONTROL}))
	f.Add(frame(f, &agentv1.StreamHeader{Kind: agentv1.StreamHeader_KIND_RESOLVER, Address: "127.0.0.11:53"}))
	f.Add(frame(f, &agentv1.StreamHeader{Kind: agentv1.StreamHeader_KIND_FORWARD, Address: "[::1]:80"}))
	f.Add([]byte{0, 0, 0, 0})
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 1})
	f.Add([]byte{0, 0, 0, 3, 8, 2, 0x12})
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		h, err := readHeader(r)
		read := len(b) - r.Len()
		if read > 4+agentv1.MaxStreamHeader {
			t.Errorf("%d bytes were read", read)
		}
		if err != nil {
			return
		}
		switch h.Kind {
		case agentv1.StreamHeader_KIND_CONTROL:
		case agentv1.StreamHeader_KIND_RESOLVER, agentv1.StreamHeader_KIND_FORWARD:
			if a, err := netip.ParseAddrPort(h.Address); err != nil || !a.Addr().IsLoopback() {
				t.Errorf("accepted %v", h)
			}
		default:
			if h.Kind == agentv1.StreamHeader_KIND_UNSPECIFIED || h.ContainerId == "" {
				t.Errorf("accepted %v", h)
			}
		}
		again, err := readHeader(bytes.NewReader(b[:read]))
		if err != nil || !proto.Equal(h, again) {
			t.Errorf("read again: %v, %v", again, err)
		}
	})
}

// nothing is an Engine that refuses all containers.
type nothing struct{}

func (nothing) New(*agentv1.CreateContainerRequest) (Container, error) { return nil, errFake }
func (nothing) Prepare() error                                         { return nil }

// FuzzRequest sends arbitrary requests to an agent without containers: each is
// answered, none ends the agent or leaves anything.
func FuzzRequest(f *testing.F) {
	add := func(kind byte, m proto.Message) {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(kind, b)
	}
	add(0, &agentv1.HelloRequest{ProtocolVersion: 1, TimeUnixNano: 1, Entropy: make([]byte, 32)})
	add(1, &agentv1.ConfigureSandboxRequest{SandboxId: "x", MachineId: "0123456789abcdef0123456789abcdef", Shares: []*agentv1.Share{{Tag: "a", Type: "9p"}}})
	add(2, shellContainer("c", "true", &agentv1.Stdio{Stdin: true, Stdout: true, Stderr: true}))
	add(3, &agentv1.ExecRequest{ContainerId: "c", ExecId: "e", Process: &agentv1.Process{Terminal: true}})
	add(4, &agentv1.SignalProcessRequest{ContainerId: "c", Signal: 9, All: true})
	add(5, &agentv1.ResizeTerminalRequest{ContainerId: "c", Height: 1 << 20})
	f.Fuzz(func(t *testing.T, kind byte, b []byte) {
		a := New("v", &fakeSystem{}, nothing{}, log.New(io.Discard, "", 0))
		s := &service{agent: a}
		if kind%16 != 1 {
			a.configured = true
		}
		ctx := context.Background()
		call := func(m proto.Message, do func() (proto.Message, error)) {
			if proto.Unmarshal(b, m) != nil {
				return
			}
			resp, err := do()
			if err != nil {
				if st := toStatus(err); len(st.Error()) > maxError+100 {
					t.Errorf("error of %d bytes", len(st.Error()))
				}
			} else if proto.Size(resp) > agentv1.MaxResponse {
				t.Errorf("response of %d bytes", proto.Size(resp))
			}
		}
		switch kind % 16 {
		case 0:
			m := new(agentv1.HelloRequest)
			call(m, func() (proto.Message, error) { return s.Hello(ctx, m) })
		case 1:
			m := new(agentv1.ConfigureSandboxRequest)
			call(m, func() (proto.Message, error) { return s.ConfigureSandbox(ctx, m) })
		case 2:
			m := new(agentv1.CreateContainerRequest)
			call(m, func() (proto.Message, error) { return s.CreateContainer(ctx, m) })
		case 3:
			m := new(agentv1.ExecRequest)
			call(m, func() (proto.Message, error) { return s.Exec(ctx, m) })
		case 4:
			m := new(agentv1.SignalProcessRequest)
			call(m, func() (proto.Message, error) { return s.SignalProcess(ctx, m) })
		case 5:
			m := new(agentv1.ResizeTerminalRequest)
			call(m, func() (proto.Message, error) { return s.ResizeTerminal(ctx, m) })
		default:
			m := new(agentv1.WaitProcessRequest)
			call(m, func() (proto.Message, error) { return s.WaitProcess(ctx, m) })
		}
		if len(a.containers) != 0 || len(a.slots) != 0 || len(a.pending) != 0 {
			t.Error("something is left")
		}
	})
}

func FuzzDHCP(f *testing.F) {
	mac := [6]byte{2, 0, 0, 0, 0, 1}
	f.Add(serverPacket(dhcpOffer, 7, mac))
	f.Add(serverPacket(dhcpAck, 7, mac)[:200])
	f.Fuzz(func(_ *testing.T, b []byte) {
		if _, l, ok := parseDHCP(unwrapUDP(b), 7, mac); ok {
			_ = l.resolvConf()
		}
	})
}

func FuzzProcess(f *testing.F) {
	f.Add([]byte("7 (a) b) S 1 7 7 34816 7 0 0 0 0 0 12 5 0 0 20 0 1 0 12345 0 0"), []byte("Uid:\t5\t5\nNSpid:\t7\t1\n"))
	f.Fuzz(func(_ *testing.T, stat, status []byte) {
		i := new(agentv1.ProcessInfo)
		_, _ = parseStat(stat, 1, i)
		_ = parseStatus(status, i)
	})
}
