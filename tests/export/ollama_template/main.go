// Renders an Ollama template as Ollama does: its functions, its data types, its merging of messages.
//
// Reads {"template": text, "cases": [{"messages", "tools", "think"}]} and prints a JSON list of the prompts, with the
// tags that Ollama would find for thinking and tool calls: {"prompts", "thinking": [open, close], "call"}.
package main

import (
	"bytes"
	"encoding/json"
	"log"
	"os"
	"strings"
	"text/template"
	"text/template/parse"
	"time"
)

type arguments map[string]any

func (a arguments) String() string { return asJSON(a) }

type call struct {
	ID       string `json:"id"`
	Function struct {
		Index     int
		Name      string    `json:"name"`
		Arguments arguments `json:"arguments"`
	} `json:"function"`
}

type message struct {
	Role       string `json:"role"`
	Content    string `json:"content"`
	Thinking   string `json:"thinking"`
	ToolCalls  []call `json:"tool_calls"`
	ToolName   string `json:"tool_name"`
	ToolCallID string `json:"tool_call_id"`
}

type kinds []string

func (k *kinds) UnmarshalJSON(data []byte) error {
	var one string
	if json.Unmarshal(data, &one) == nil {
		*k = kinds{one}
		return nil
	}
	return json.Unmarshal(data, (*[]string)(k))
}

func (k kinds) MarshalJSON() ([]byte, error) {
	if len(k) == 1 {
		return json.Marshal(k[0])
	}
	return json.Marshal([]string(k))
}

func (k kinds) String() string {
	if len(k) == 1 {
		return k[0]
	}
	return strings.Join(k, " ")
}

type property struct {
	AnyOf       []property          `json:"anyOf,omitempty"`
	Type        kinds               `json:"type,omitempty"`
	Items       any                 `json:"items,omitempty"`
	Description string              `json:"description,omitempty"`
	Enum        []any               `json:"enum,omitempty"`
	Properties  map[string]property `json:"properties,omitempty"`
	Required    []string            `json:"required,omitempty"`
}

type tool struct {
	Type     string `json:"type"`
	Function struct {
		Name        string `json:"name"`
		Description string `json:"description"`
		Parameters  struct {
			Type       string              `json:"type"`
			Required   []string            `json:"required,omitempty"`
			Properties map[string]property `json:"properties"`
		} `json:"parameters"`
	} `json:"function"`
}

type tools []tool

func (t tools) String() string { return asJSON(t) }

func asJSON(value any) string {
	data, _ := json.Marshal(value)
	return string(data)
}

var functions = template.FuncMap{
	"json":          asJSON,
	"currentDate":   func(...string) string { return time.Now().Format("2006-01-02") },
	"yesterdayDate": func(...string) string { return time.Now().AddDate(0, 0, -1).Format("2006-01-02") },
}

// Consecutive messages of one role are one, except results of tools; the system texts are gathered.
func collate(messages []message) (string, []*message) {
	var system []string
	var merged []*message
	for i := range messages {
		if messages[i].Role == "system" {
			system = append(system, messages[i].Content)
		}
		last := len(merged) - 1
		if last >= 0 && merged[last].Role == messages[i].Role && messages[i].Role != "tool" {
			merged[last].Content += "\n\n" + messages[i].Content
		} else {
			merged = append(merged, &messages[i])
		}
	}
	return strings.Join(system, "\n\n"), merged
}

func main() {
	var request struct {
		Template string `json:"template"`
		Cases    []struct {
			Messages []message `json:"messages"`
			Tools    tools     `json:"tools"`
			Think    *bool     `json:"think"`
		} `json:"cases"`
	}
	if err := json.NewDecoder(os.Stdin).Decode(&request); err != nil {
		log.Fatal(err)
	}
	parsed, err := template.New("").Option("missingkey=zero").Funcs(functions).Parse(request.Template)
	if err != nil {
		log.Fatal(err)
	}
	prompts := []string{}
	for _, each := range request.Cases {
		system, messages := collate(each.Messages)
		var out bytes.Buffer
		if err := parsed.Execute(&out, map[string]any{
			"System": system, "Messages": messages, "Tools": each.Tools, "Response": "",
			"Think": each.Think != nil && *each.Think, "ThinkLevel": "", "IsThinkSet": each.Think != nil,
		}); err != nil {
			log.Fatal(err)
		}
		prompts = append(prompts, out.String())
	}
	open, shut := thinkingTags(parsed.Root, nil, false)
	result := map[string]any{"prompts": prompts, "thinking": []string{open, shut}, "call": callTag(parsed.Root)}
	encoder := json.NewEncoder(os.Stdout)
	if err := encoder.Encode(result); err != nil {
		log.Fatal(err)
	}
}

// Ollama takes for the tags what stands first and last in the list around the last .Thinking in a range over .Messages.
func thinkingTags(node parse.Node, around *parse.ListNode, inside bool) (open, shut string) {
	visit := func(node parse.Node, around *parse.ListNode, inside bool) {
		if o, s := thinkingTags(node, around, inside); o != "" || s != "" {
			open, shut = o, s
		}
	}
	branch := func(b *parse.BranchNode, inside bool) {
		visit(b.Pipe, around, inside)
		visit(b.List, around, inside)
		if b.ElseList != nil {
			visit(b.ElseList, around, inside)
		}
	}
	switch n := node.(type) {
	case *parse.ListNode:
		for _, child := range n.Nodes {
			visit(child, n, inside)
		}
	case *parse.IfNode:
		branch(&n.BranchNode, inside)
	case *parse.RangeNode:
		branch(&n.BranchNode, inside || strings.HasSuffix(n.Pipe.String(), " .Messages"))
	case *parse.ActionNode:
		visit(n.Pipe, around, inside)
	case *parse.TemplateNode:
		visit(n.Pipe, around, inside)
	case *parse.PipeNode:
		for _, command := range n.Cmds {
			for _, argument := range command.Args {
				visit(argument, around, inside)
			}
		}
	case *parse.FieldNode:
		if inside && n.Ident[0] == "Thinking" {
			if text, ok := around.Nodes[0].(*parse.TextNode); ok {
				open = strings.TrimSpace(text.String())
			}
			if text, ok := around.Nodes[len(around.Nodes)-1].(*parse.TextNode); ok {
				shut = strings.TrimSpace(text.String())
			}
		}
	}
	return open, shut
}

// Ollama takes for the mark of a call the first text inside the first {{ if .ToolCalls }}, up to a "{".
func callTag(node parse.Node) string {
	found := ""
	var search func(node parse.Node) bool
	branch := func(b *parse.BranchNode) bool {
		return search(b.List) || b.ElseList != nil && search(b.ElseList)
	}
	search = func(node parse.Node) bool {
		switch n := node.(type) {
		case *parse.ListNode:
			for _, child := range n.Nodes {
				if search(child) {
					return true
				}
			}
		case *parse.RangeNode:
			return branch(&n.BranchNode)
		case *parse.IfNode:
			for _, command := range n.Pipe.Cmds {
				for _, argument := range command.Args {
					if field, ok := argument.(*parse.FieldNode); ok && field.Ident[0] == "ToolCalls" {
						found = firstText(n.List)
						return true
					}
				}
			}
			return branch(&n.BranchNode)
		}
		return false
	}
	search(node)
	tag, _, _ := strings.Cut(found, "{")
	return strings.TrimSpace(tag)
}

func firstText(list *parse.ListNode) string {
	for _, node := range list.Nodes {
		switch n := node.(type) {
		case *parse.TextNode:
			if strings.TrimSpace(string(n.Text)) != "" {
				return string(n.Text)
			}
		case *parse.RangeNode:
			return firstText(n.List)
		case *parse.IfNode:
			return firstText(n.List)
		case *parse.ActionNode:
			return ""
		}
	}
	return ""
}
